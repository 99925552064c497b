"""Which instance gets a request: prefix index, load, policy, and the router that joins them."""
