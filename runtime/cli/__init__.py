"""The commands that need an artifact and the runtime alone; the full package has them too."""
