"""Position encodings that fit dilated attention: rotary, xPos, ALiBi."""
