"""Adapters to training frameworks: each imports its host, and the core never imports them."""
