"""Configuration: the dataclass schema, its cross-field validation, and the one door to Hydra."""
