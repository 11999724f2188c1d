"""Pure array functions: attention, rotary positions, vocabulary loss. Nothing here knows of configs or files."""
