"""Recurrent ops: LSTM, GRU and plain RNN, stacked and bidirectional."""
