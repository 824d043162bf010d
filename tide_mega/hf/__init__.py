"""What an exported folder holds as code: copied as it is, so that nothing here imports the rest of the package."""
