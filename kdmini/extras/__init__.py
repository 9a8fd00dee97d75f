"""Optional: one tool or one paper a file. No module of the core imports these."""
