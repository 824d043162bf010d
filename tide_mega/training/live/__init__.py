"""Live diagnostics: what each log line and each evaluation say of TIDE besides the loss."""
