"""The engine: requests, scheduling, the forward over one packed batch, sampling, and the library's front door."""
