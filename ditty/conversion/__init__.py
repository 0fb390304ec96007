"""From and to other formats: .gguf, .bin, an adapter merged into its base."""
