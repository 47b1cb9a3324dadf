"""Chat: conversations to token ids and loss masks. Only this room renders chat templates."""
