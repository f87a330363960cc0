"""What the sidecar does, one file per resource; each method reads as the story of one call. No technology is named here."""
