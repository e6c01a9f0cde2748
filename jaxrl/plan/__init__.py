"""What a step takes on chips that need not be here: counted from its sizes, and read from its compiled programs."""
