"""Anthropic's `/v1/messages`: how its requests are read and its responses written."""
