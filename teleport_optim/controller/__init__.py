"""The learned part: what the LSTM sees, the LSTM, and its weights on disk."""
