"""What data is: records, images, boxes, and their files."""
