"""What tests share. Tests import no other tests."""
