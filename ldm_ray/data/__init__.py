"""Where images come from, and uint8 ↔ float ↔ PNG."""
