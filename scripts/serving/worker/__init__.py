"""A worker process: one engine, its endpoints, its registration."""
