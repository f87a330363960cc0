"""Everything that works on the project rather than in it: set-up, generated stubs, the main job."""
