"""Configuration: the dataclass schema, its cross-field validation, and the only user of Hydra."""
