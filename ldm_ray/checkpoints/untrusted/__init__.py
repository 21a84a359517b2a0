"""Files of strangers as plain data, within bounds of memory and time, with nothing in them executed."""
