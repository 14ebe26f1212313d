"""What a person starts: the demo, the tests and the training job. Run from the checkout; not installed."""
