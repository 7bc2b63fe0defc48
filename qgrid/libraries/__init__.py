"""Libraries that need a hand before they do what they say."""
