"""Model families beside Uni-Med, one folder each."""
