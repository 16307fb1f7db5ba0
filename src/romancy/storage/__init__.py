"""Where state lives: schema, group commit, leases, queries. Everything above asks this package, never a driver."""
