"""The paper's propositions 3.1, 3.2 and 3.3, checked with the numbers of trained models."""
