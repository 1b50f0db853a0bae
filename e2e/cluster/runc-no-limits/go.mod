module runc-no-limits

go 1.26
