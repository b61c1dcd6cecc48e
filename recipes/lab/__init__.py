"""The embedded lab: a small invented world whose text, instructions and preferences have a known truth."""
