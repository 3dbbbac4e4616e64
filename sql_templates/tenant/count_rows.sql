-- component: indexes
-- purpose: how many memories the larger users have
-- variables: row_count_minimum
-- runs as: service
-- safe to repeat: reads only
select user_id, count(*) from memharbor.memories
where user_id is not null
group by user_id
having count(*) >= {{ row_count_minimum }}
order by count(*) desc, user_id
