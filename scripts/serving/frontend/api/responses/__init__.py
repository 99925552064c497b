"""OpenAI's `/v1/responses`: how its requests are read, its responses written and kept."""
