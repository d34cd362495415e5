"""What a decode or a data set shows: numbers read from traces, outputs and losses."""
