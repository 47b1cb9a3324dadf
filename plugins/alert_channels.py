"""The channels of alerts: how a message looks in each channel, and how it is sent.

To add a channel, write a function that sends a `Message` to one recipient, add it to `CHANNELS`, and add the recipe
field that lists the recipients (include/recipe/operations.py).
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from airflow.sdk.exceptions import AirflowNotFoundException
from tenacity import Retrying, retry_if_not_exception_type
from tenacity.stop import stop_after_attempt
from tenacity.wait import wait_exponential_jitter

MAIL_CONNECTION = "smtp_default"
SEND_ATTEMPTS = 3  # attempts to send one message, seconds apart
WEBHOOK_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class Message:
    """A message, short enough to read on a telephone.

    Attributes:
        event: one of the recipe's `alert_on`: `published`, `refused`, `failed` or `late`.
        subject: the recipe, what happened, and in which stage.
        summary: what the reader needs first, by label.
        details: what helps to find the run, by label; too long for a webhook's message.
        link: address of the run in Airflow's UI; None if there is no UI.
    """

    event: str
    subject: str
    summary: dict[str, str]
    details: dict[str, str]
    link: str | None

    def text(self) -> str:
        """Return the message as aligned plain text."""
        lines = [f"{label + ':':<12}{value}" for label, value in (self.summary | self.details).items()]
        return "\n".join([self.subject, "", *lines, *(["", f"Open the run: {self.link}"] if self.link else []), ""])

    def html(self) -> str:
        """Return the message as HTML without style sheets."""
        cell = '<td style="padding:2px 12px 2px 0;vertical-align:top'
        rows = "".join(
            f'<tr>{cell};color:#666">{html.escape(label)}</td>{cell}">{_linked(value)}</td></tr>'
            for label, value in (self.summary | self.details).items()
        )
        link = f'<p><a href="{html.escape(self.link)}">Open the run</a></p>' if self.link else ""
        return f"<p><b>{html.escape(self.subject)}</b></p><table>{rows}</table>{link}"

    def slack(self) -> str:
        """Return the message as Slack's mrkdwn, without the details."""
        lines = "\n".join(_escaped(f"{label}: {value}") for label, value in self.summary.items())
        return f"*{_escaped(self.subject)}*\n{lines}" + (f"\n<{self.link}|Open the run>" if self.link else "")


def send_mail(message: Message, address: str) -> None:
    """Send a message to a mail address through the connection `smtp_default`, as plain text and as HTML.

    Raises:
        AirflowNotFoundException: the connection does not exist.
    """
    from email.mime.text import MIMEText

    from airflow.providers.smtp.hooks.smtp import SmtpHook
    from airflow.sdk import Connection

    class Hook(SmtpHook):
        """Puts the plain text in front of the HTML: the hook itself sends HTML only."""

        def _build_mime_message(self, *arguments: Any, **options: Any) -> Any:
            content, recipients = super()._build_mime_message(*arguments, **options)
            content.set_payload([MIMEText(message.text(), "plain", "utf-8"), *content.get_payload()])
            return content, recipients

    Connection.get(MAIL_CONNECTION)  # the hook's own error does not say that the connection is missing
    with Hook(MAIL_CONNECTION) as hook:
        hook.send_email_smtp(
            to=[address], subject=message.subject, html_content=message.html(), mime_subtype="alternative"
        )


def send_webhook(message: Message, connection: str) -> None:
    """Post a message to the Slack-compatible webhook of a connection of the type `slackwebhook`.

    Raises:
        AirflowNotFoundException: the connection does not exist.
    """
    from airflow.providers.slack.hooks.slack_webhook import SlackWebhookHook

    hook = SlackWebhookHook(slack_webhook_conn_id=connection, timeout=WEBHOOK_TIMEOUT)
    hook.send(text=message.slack(), unfurl_links=False)


@dataclass(frozen=True)
class Channel:
    """A way to send messages, for example mail.

    Attributes:
        recipe_field: the recipe field that lists the recipients.
        label: how the log names a recipient, with `{}` for the entry of the list.
        send: sends a message to one recipient; raises if that fails.
        setup: how to set up the channel; part of the error message if an alert was not sent.
    """

    recipe_field: str
    label: str
    send: Callable[[Message, str], None]
    setup: str

    def send_with_retries(self, message: Message, recipient: str) -> None:
        """Send a message in at most `SEND_ATTEMPTS` attempts. A missing connection is not retried."""
        Retrying(
            retry=retry_if_not_exception_type(AirflowNotFoundException), stop=stop_after_attempt(SEND_ATTEMPTS),
            wait=wait_exponential_jitter(initial=1, max=10), reraise=True,
        )(self.send, message, recipient)  # fmt: skip


CHANNELS = (
    Channel("alert_mail", "mail to {}", send_mail, f"mail uses the connection {MAIL_CONNECTION}"),
    Channel(
        "alert_webhooks", "webhook {}", send_webhook,
        "a webhook uses a connection of the type slackwebhook, whose password is the complete address",
    ),
)  # fmt: skip


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _linked(text: str) -> str:
    return re.sub(r"^(https?://\S+)$", r'<a href="\1">\1</a>', html.escape(text)).replace("\n", "<br>")
