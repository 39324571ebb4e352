"""The proof of a release: every tensor, and the whole model beside the live one."""
