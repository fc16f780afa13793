"""In-context learning, shown in minutes: `make in-context`."""
