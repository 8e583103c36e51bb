"""What the verbs share on their way from a typed line to the work: options, checks, hints, help, settings."""
