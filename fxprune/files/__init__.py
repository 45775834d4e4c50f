"""Files: results saved and loaded whole, and packed results that leave Python."""
