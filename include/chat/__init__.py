"""Chat: conversations to token ids and loss masks."""
