"""Chat: conversations to token ids and loss masks. Only this package renders chat templates."""
