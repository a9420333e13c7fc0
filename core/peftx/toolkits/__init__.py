"""What plugins of one hook share: packed weights, loops of decoding, measures, the server."""
