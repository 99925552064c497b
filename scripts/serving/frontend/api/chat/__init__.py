"""`/v1/chat/completions`: how its requests are read and its responses written."""
