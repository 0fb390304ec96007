"""The line of stages: what each is called, its content key, and how data stages are made."""
