-- component: roles
-- purpose: the database that holds the memories
-- variables: database, from_template0
-- runs as: administrator
-- safe to repeat: run only where the database does not exist
-- transaction: no
create database {{ database | ident }} owner memharbor_owner{% if from_template0 %} template template0 encoding 'UTF8'{% endif %};
