"""Model families, one folder each, and what they share: parts, adapters, cards, loading."""
