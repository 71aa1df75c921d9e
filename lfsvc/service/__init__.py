"""The service: accepts, stores, orders, starts and ends jobs. Does no work itself."""
