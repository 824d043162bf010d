"""The lab: looks at models and measures them; nothing that trains imports it."""
