"""What a model can do, measured: each test makes or reads its films, asks, and keeps every answer."""
