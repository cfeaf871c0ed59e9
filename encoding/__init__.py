"""Encoding that does not wait: reading ahead of the model, batches by tokens, streams, several devices."""
