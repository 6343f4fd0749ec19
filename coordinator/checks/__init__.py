"""What `fedchord doctor` looks at, one module for each thing; none of them changes anything."""
