"""Exchange models and parties with the nodes above and below, server to server."""
