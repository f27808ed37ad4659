"""Unit tests of the rule engine, on hand-made blocks."""
