"""Requests to OpenAI-compatible servers, and one load generator for servers and engines."""
