"""The plain C servers (the limits) and the load generator."""
